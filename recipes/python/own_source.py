"""A data source of your own: text to calibrate and train on, here the cells of Jupyter notebooks.

    python own_source.py train smollm2-135m-int4 "data={source: notebooks, path: FOLDER}"

This script is the command line of llmqat with one source more. It may read every key of `data` that the source
`dataset` has; splitting, tokenizing and packing to blocks are done as for all sources.
"""

import json

from llmqat.cli import main
from llmqat.data import SOURCES, DataConfig, DocumentSource, source_of_texts


@SOURCES.register("notebooks")
def open_notebooks(config: DataConfig) -> DocumentSource:
    """Returns one document for each notebook below data.path."""
    if config.path is None or not (files := sorted(config.path.rglob("*.ipynb"))):
        raise ValueError(f"data.path={config.path} holds no .ipynb file; give a folder of notebooks")
    books = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    texts = ["\n\n".join("".join(cell["source"]) for cell in book["cells"]) for book in books]
    return source_of_texts(f"notebooks in {config.path}", texts)


if __name__ == "__main__":
    main()
