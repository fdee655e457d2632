"""``codeact report``: a run folder -> one HTML page that needs nothing but itself.

run folder -> data, rows -> plots, tables -> page, page.html
"""
