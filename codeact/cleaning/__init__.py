"""``codeact clean``: which rows a data set is better without, and which other row or task each of them repeats.

records -> answers (what does not parse) -> contamination (tasks of evaluation sets)
        -> duplicates (exact, near, similar questions) -> a table with a status for every row
"""
