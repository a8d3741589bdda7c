"""A local page over an engine: answers as they are written, thresholds on labelled questions, texts compared by layer.

``kvroute ui`` starts it. :mod:`kvroute.ui.desk` is what the page may ask, without a server; :mod:`kvroute.ui.app` puts
it on a port.
"""
