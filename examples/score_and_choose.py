"""IFD of rows in memory, the difficult part of every cluster: python score_and_choose.py MODEL EMBEDDER ROWS.jsonl"""

import sys

import codeact

model, embedder, path = sys.argv[1:]
records = codeact.open_records(path, codeact.Columns(question="instruction", answer="output"))
rows = [row for row in records if isinstance(row, codeact.Record)]

table = codeact.score_ifd(model, records=rows, max_length=512)  # a pyarrow table: to pandas, polars or DuckDB from here
ifd = table["ifd"].to_pylist()
print(f"IFD of {len(rows)} rows: {min(ifd):.3f} to {max(ifd):.3f}")

labels = codeact.cluster(codeact.embed([row.question for row in rows], embedder), k=3)
chosen = codeact.select(table, labels, ratio=0.4)
print(f"chosen: {len(chosen)} rows, such as {chosen[:3]}")
