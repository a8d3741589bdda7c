"""The page in a real browser: chromium or Chrome, headless, on the tiny thinker. Skipped where there is none.

With ``KVROUTE_SCREENSHOTS=FOLDER`` the pictures of each view are kept there.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvroute import DifficultyHead, Router, SamplingOptions, TransformersEngine
from kvroute.candidates import one_step_candidate
from kvroute.label_rows import read_labels, usable
from kvroute.ui.demo import THINKER_QUESTIONS

pytestmark = pytest.mark.real

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium and its driver are not installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
sys.path.insert(0, str(FOLDER))
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)
DESKTOP, PHONE = (1200, 900), (390, 844)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from questions import make_question

    folder = tmp_path_factory.mktemp("ui")
    rng = random.Random("looked at in a browser")
    asked = [make_question(rng) for _ in range(150)]
    rows = [{"question": q.question, "answer": q.answer, "answer_type": "number"} for q in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, "-m", "kvroute.cli", "label", "questions.jsonl", "--model", str(FOLDER / "model"), "--max-fast",
        "48", "--max-slow", "192", "--checkpoints", "10", "-o", "labels.jsonl", "--quiet",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "labels.jsonl"


@pytest.fixture(scope="module")
def place(labels: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "kvroute.cli", "ui", "--labels", str(labels), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        yield re.findall(r"http://\S+", served.stdout.readline())[0]
        served.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, place: str) -> Iterator[Any]:
    browser.get_log("performance")
    resize(browser, DESKTOP)
    media(browser)
    browser.get("about:blank")
    browser.get(place)
    until(browser, lambda: "layers" in shown(browser, "about"))
    yield browser
    requests = [
        m["params"]["request"]["url"]
        for m in (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert requests
    assert not [url for url in requests if not url.startswith((place, "about:"))]
    assert browser.get_log("browser") == []


def until(browser: Any, true: Any, seconds: float = 20) -> None:
    WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: true())


def resize(browser: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def media(browser: Any, scheme: str = "light", motion: str = "no-preference") -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def picture(browser: Any, name: str) -> None:
    folder = os.environ.get("KVROUTE_SCREENSHOTS")
    if folder:
        height = browser.execute_script("return document.documentElement.scrollHeight")
        width = browser.execute_script("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        import base64

        data = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"])
        (Path(folder) / f"{name}.png").write_bytes(data)


def find(browser: Any, css: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, css)


def shown(browser: Any, name: str) -> str:
    return str(find(browser, f"#{name}").text)


def key(browser: Any, *keys: str) -> None:
    browser.switch_to.active_element.send_keys(*keys)


def fits(browser: Any) -> bool:
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"))


def ask(browser: Any, question: str) -> None:
    box = find(browser, "#question")
    box.clear()
    box.send_keys(question)
    box.send_keys(Keys.CONTROL, Keys.ENTER)


def done(browser: Any) -> None:
    until(browser, lambda: find(browser, "#send").is_enabled() and find(browser, "#result").is_displayed())


def written(browser: Any, lane: int) -> str:
    """A lane's text without numbers and marks."""
    script = (
        "return [...arguments[0].querySelectorAll('[data-token]')].map(s => s.dataset.raw ?? s.textContent).join('')"
    )
    return str(browser.execute_script(script, browser.find_elements(By.CSS_SELECTOR, ".lane .text")[lane]))


def first_behind(browser: Any, mark: Any) -> int:
    """The first token that stands behind a mark."""
    script = """
        const mark = arguments[0];
        const behind = (s) => mark.compareDocumentPosition(s) & Node.DOCUMENT_POSITION_FOLLOWING;
        return [...mark.closest('.lane').querySelectorAll('[data-token]')].find(behind).dataset.token;
    """
    return int(browser.execute_script(script, mark))


def test_an_answer_streams_switches_and_is_coloured(page: Any) -> None:
    engine = TransformersEngine.from_pretrained(FOLDER / "model")
    confidence = DifficultyHead.load(FOLDER / "confidence", engine.info)
    router = Router(engine, FOLDER / "policy.json", confidence=confidence, options=SamplingOptions(max_tokens=192))
    switched = 0
    for example in THINKER_QUESTIONS:
        Select(find(page, "#examples")).select_by_visible_text(example.name)
        question = find(page, "#question").get_attribute("value")
        assert question == example.question
        ask(page, question)
        done(page)
        chat = [{"role": "user", "content": question}]
        routed, slow = router.generate([chat, chat], mode=[None, "slow"], progress=False)
        assert written(page, 0) == routed.text
        assert written(page, 1) == slow.text
        assert f"{routed.usage.generated} tokens" in find(page, ".lane .count").text
        assert f"confidence {routed.confidence:.2f}".replace("0.", ".") in find(page, ".lane .count").text
        assert f"difficulty {routed.decision.difficulty:.1f}" in find(page, ".lane .said").text
        numbers = [e.text for e in page.find_elements(By.CSS_SELECTOR, ".lane .conf")]
        assert numbers
        assert all(re.fullmatch(r"\.\d\d|1\.00", n) for n in numbers)
        assert find(page, "#legend").is_displayed()
        saved = slow.usage.generated - routed.usage.generated
        if saved:
            assert f"{abs(saved)} {'fewer' if saved > 0 else 'more'} than always slow" in shown(page, "tokens")
        marks = page.find_elements(By.CSS_SELECTOR, ".lane:first-child .switch")
        switch = routed.decision.switch
        assert len(marks) == (switch is not None)
        if switch is not None:
            switched += 1
            assert f"at token {switch.token}" in marks[0].text
            assert first_behind(page, marks[0]) == switch.token
            forced = page.find_elements(By.CSS_SELECTOR, ".lane:first-child .forced")
            assert forced
            picture(page, "ask-light")
            media(page, "dark")
            picture(page, "ask-dark")
            resize(page, PHONE)
            assert fits(page)
            picture(page, "ask-phone-dark")
            media(page)
            picture(page, "ask-phone")
            resize(page, DESKTOP)
        assert len(page.find_elements(By.CSS_SELECTOR, "#difficulty circle")) == len(routed.decision.checkpoints)
    assert switched


def test_it_streams_and_can_be_stopped(page: Any) -> None:
    """What is there is kept when it is stopped. At a temperature its thoughts wander on, some for a few words only."""
    question = next(q for q in THINKER_QUESTIONS if "run" in q.question).question
    find(page, "#max-tokens").clear()
    find(page, "#max-tokens").send_keys(find(page, "#max-tokens").get_attribute("max"))
    find(page, "#temperature").clear()
    find(page, "#temperature").send_keys("2")
    for _ in range(20):
        before = written(page, 1) if page.find_elements(By.CSS_SELECTOR, ".lane") else ""
        ask(page, question)
        until(page, lambda before=before: written(page, 1) not in ("", before))
        key(page, Keys.ESCAPE)
        done(page)
        if shown(page, "ask-state") == "Stopped.":
            break
    else:
        pytest.fail("no answer could be stopped")
    first = written(page, 1)
    assert first
    ask(page, question)  # the server is free again
    until(page, lambda: find(page, "#stop").is_displayed() or written(page, 1) not in ("", first))
    picture(page, "streaming")
    until(page, lambda: written(page, 1) not in ("", first))
    key(page, Keys.ESCAPE)
    done(page)


def test_faults_are_said_on_the_page(page: Any) -> None:
    find(page, "#max-tokens").clear()
    find(page, "#max-tokens").send_keys(find(page, "#max-tokens").get_attribute("max"))
    page.execute_script("arguments[0].value = 'map so:c>e '.repeat(500)", find(page, "#question"))
    find(page, "#send").click()
    until(page, lambda: find(page, "#ask-fault").is_displayed())
    assert "tokens, and the limit is" in shown(page, "ask-fault")
    assert find(page, "#send").is_enabled()


def test_sliders_redraw_the_curve(page: Any, labels: Path) -> None:
    find(page, "#tab-ask").click()
    key(page, Keys.ARROW_RIGHT)
    until(page, lambda: find(page, "#curve-body").is_displayed())
    rows, _ = read_labels(labels)
    test = usable(rows, "test")
    engine = TransformersEngine.from_pretrained(FOLDER / "model")
    head = DifficultyHead.load(FOLDER / "head", engine.info)
    difficulty = head.predict(engine.pool([list(r.prompt_ids) for r in test], [head.spec], progress=False)[0])
    slide(page, "tau-fast", 0)
    for tau, give_up in ((30.0, 100.0), (60.0, 90.0), (0.5, 100.0)):
        before = find(page, "#curve svg").get_attribute("innerHTML")
        slide(page, "tau", tau)
        slide(page, "give-up", give_up)
        mine = one_step_candidate(difficulty, test, tau, None if give_up == 100 else give_up)
        row = find(page, "#readout tr.now").text
        assert f"{mine.accuracy:.3f}" in row
        assert f"{mine.mean_tokens:.1f}" in row
        assert f"{round(100 * float(mine.slow.mean()))} %" in row
        assert find(page, "#curve svg").get_attribute("innerHTML") != before
    plain = float(find(page, "#readout tr.now").text.split()[-3])
    slide(page, "tau-fast", 20)
    assert float(find(page, "#readout tr.now").text.split()[-3]) < plain  # thoughts that close cost less
    find(page, "#reset").click()
    picture(page, "thresholds-light")
    media(page, "dark")
    picture(page, "thresholds-dark")
    resize(page, PHONE)
    assert fits(page)
    picture(page, "thresholds-phone-dark")


def slide(page: Any, name: str, value: float) -> None:
    """By keyboard: to the left end, then in steps."""
    slider = find(page, f"#{name}")
    page.execute_script("arguments[0].focus()", slider)
    slider.send_keys(Keys.HOME)
    at = float(slider.get_attribute("value"))
    pages = max(int((value - at) // 10), 0)
    slider.send_keys(*[Keys.PAGE_UP] * pages)
    left = value - float(slider.get_attribute("value"))
    slider.send_keys(*[Keys.ARROW_RIGHT if left > 0 else Keys.ARROW_LEFT] * round(abs(left) / 0.5))
    assert float(slider.get_attribute("value")) == value


def test_two_texts_by_layer(page: Any) -> None:
    engine = TransformersEngine.from_pretrained(FOLDER / "model")
    find(page, "#tab-ask").click()
    key(page, Keys.END)
    assert page.switch_to.active_element.get_attribute("id") == "tab-compare"
    find(page, "#compare-send").click()
    until(page, lambda: find(page, "#compare-result").is_displayed())
    assert len(page.find_elements(By.CSS_SELECTOR, "#layers circle")) == engine.info.num_layers
    assert len(page.find_elements(By.CSS_SELECTOR, "#layers rect")) == engine.info.num_layers
    before = shown(page, "compare-summary")
    find(page, "#free").click()
    assert shown(page, "compare-summary") != before
    find(page, "#free").click()
    find(page, "#compare-result summary").click()
    assert len(page.find_elements(By.CSS_SELECTOR, "#layers-table tbody tr")) == engine.info.num_layers
    picture(page, "compare-light")
    media(page, "dark")
    resize(page, PHONE)
    assert fits(page)
    picture(page, "compare-phone-dark")


def test_by_keyboard_alone(page: Any) -> None:
    """Everything that can be worked can be reached, has a name, and shows that it has the focus."""
    page.execute_script("document.activeElement.blur()")
    seen = []
    for _ in range(14):
        page.switch_to.active_element.send_keys(Keys.TAB)
        at = page.switch_to.active_element
        seen.append(at.get_attribute("id") or at.get_attribute("class"))
        assert at.accessible_name, seen
        width = page.execute_script("return getComputedStyle(arguments[0]).outlineWidth", at)
        assert width == "3px", seen
        if seen[-1] == "send":
            break
    assert seen[0] == "skip"
    assert seen[1:] == ["tab-ask", "question", "examples", "mode", "max-tokens", "temperature", "beside", "send"]
    key(page, Keys.ENTER)
    done(page)
    assert "tokens." in page.execute_script("return document.getElementById('live').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(page: Any, scheme: str) -> None:
    """At least 4.5 to 1 (WCAG AA), on every colour of a sentence too."""
    media(page, scheme)
    ratio = page.execute_script(
        """
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const light = (c) => {
          const [r, g, b] = c.match(/[\\d.]+/g).map((v) => linear(Number(v) / 255));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const made = document.createElement("span");
        document.body.append(made);
        const colour = (name) => { made.style.color = `var(--${name})`; return getComputedStyle(made).color; };
        const pairs = [["ink", "page"], ["ink", "card"], ["quiet", "page"], ["quiet", "card"], ["fault", "fault-page"],
          ["switch", "switch-page"], ["forced", "card"], ["forced", "thought"], ["accent-ink", "accent"],
          ["ink", "thought"], ["quiet", "thought"], ...[0, 1, 2, 3, 4].map((n) => ["ink", `c${n}`])];
        const found = pairs.map(([a, b]) => { const [x, y] = [light(colour(a)), light(colour(b))].sort((p, q) => q - p);
          return [`${a} on ${b}`, (x + 0.05) / (y + 0.05)]; });
        made.remove();
        return found.sort((p, q) => p[1] - q[1])[0];
        """
    )
    assert ratio[1] >= 4.5, ratio


def test_nothing_moves_where_that_is_not_wanted(page: Any) -> None:
    script = """
        const made = document.createElement('div');
        made.className = 'writing';
        const text = document.createElement('div');
        text.className = 'segment';
        made.append(text);
        document.body.append(made);
        const name = getComputedStyle(text, '::after').animationName;
        made.remove();
        return name;
    """
    assert page.execute_script(script) == "blink"
    media(page, motion="reduce")
    assert page.execute_script(script) == "none"
