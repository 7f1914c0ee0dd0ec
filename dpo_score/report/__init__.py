"""The report of a run: one HTML page, the same numbers as text tables, and what trackers are sent.

In: OUT, read through results/. Out: report.html, Markdown, CSV and LaTeX, or a call to a tracker; only build.py and
trackers.py touch files. May import metrics, results and what lies below them; loads no model.
"""
