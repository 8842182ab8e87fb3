"""Readers of examples, one file a source: each yields records (data/records.py) in the order of its files.

The official VQA files have a reader of their own (vqa_files.py). All others are tables: rows with named columns
(rows.py), and a function of this mapping makes a `Table` of what a configuration says.
"""

from collections.abc import Callable
from pathlib import Path

from data.sources.coco import coco
from data.sources.delimited import csv_file, tsv_file
from data.sources.folder import image_folder
from data.sources.json_lines import json_lines
from data.sources.messages import messages
from data.sources.rows import Table

TABLES: dict[str, Callable[[Path, Path | None], Table]] = {
    "jsonl": json_lines,
    "csv": csv_file,
    "tsv": tsv_file,
    "messages": messages,
    "folder": image_folder,
    "coco": coco,
}
"""Key of a source -> what opens it: the path that is given, and the folder of the images, if that is given."""
