"""The HTML report of a saved comparison as a picture, for the guides. It runs no model.

A browser draws it, Qt's: `pip install PySide6`, which nothing else here needs.

    python eval/report_picture.py --report eval/results/demo-smollm2-135m-int3.json --picture report.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from llmqat.evaluate.html import to_html
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import show_any_text

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --disable-logging")
WIDTH, HEIGHT, SETTLED_MS = 1240, 1190, 1500


def main() -> None:
    """Draws the picture."""
    show_any_text()
    options = parse_options()
    check_outputs({"--picture": options.picture}, [options.report])
    report = json.loads(options.report.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(to_html(report.get("comparison", report)), encoding="utf-8")
        draw(page, options.picture, options.height)
    print(f"written: {options.picture}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=user_path, required=True, help="JSON of a comparison, or of a run")
    parser.add_argument("--picture", type=user_path, required=True, help="PNG to write")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels of the page that are shown, from its top")
    return parser.parse_args()


def draw(page: Path, picture: Path, height: int) -> None:
    """Writes what a browser shows of the HTML file `page` to the PNG file `picture`."""
    try:
        from PySide6.QtCore import QTimer, QUrl
        from PySide6.QtWebEngineCore import QWebEngineSettings
        from PySide6.QtWebEngineWidgets import QWebEngineView
        from PySide6.QtWidgets import QApplication
    except ImportError as error:
        raise SystemExit(f"{error}; pip install PySide6") from error
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.resize(WIDTH, height)

    def grab() -> None:
        view.grab().save(str(picture))
        application.quit()

    view.loadFinished.connect(lambda _: QTimer.singleShot(SETTLED_MS, grab))
    view.load(QUrl.fromLocalFile(str(page)))
    view.show()
    application.exec()


if __name__ == "__main__":
    main()
