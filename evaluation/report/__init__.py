"""The last stage of an evaluation: `metrics.json`, `scenes.csv`, a page that loads nothing, and the table of a sweep.

Nothing here measures; what is shown stands in the records of the stages before.
"""
