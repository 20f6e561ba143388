"""`report.html` and `before_after.png`: a run's results in files that need nothing else to be viewed.

`record` reads the log, `charts` draws it as SVG, `pictures` resizes and embeds samples, `page` puts the whole together,
and `write` writes it.
"""
