import re
from pathlib import Path

import clipcap_jax
from clipcap_jax import pages
from clipcap_jax.commands import outputs
from clipcap_jax.datasets.page import write_page as write_data_set
from clipcap_jax.datasets.summary import Summary
from clipcap_jax.evaluation import report
from clipcap_jax.metrics import Scores
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.scorecard import Scorecard

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_every_page_forbids_what_is_not_in_it(tmp_path: Path) -> None:
    scorecard = Scorecard(Scores(("1",), {"CIDEr": mean([1.0])}, {}), domains={}, health={}, details={})
    rows = [report.Row("1", "a cat", ("a cat",), {"CIDEr": 1.0}, lambda: None, "", "", True)]
    report.write_page(tmp_path / "page.html", title="captions", rows=rows, scorecard=scorecard)
    write_data_set(
        tmp_path / "dataset.html", Summary("made", "there", {"train": 1}, {"train": 1}, {2: 1}, {}, (), (), {}), "", {}
    )
    outputs.write(tmp_path / "captions.html", iter([{"image": "1.jpg", "error": "broken"}]), [tmp_path / "1.jpg"])
    shown, caption = pages.picture(None, "", ""), {"text": "a cat", "finished": True}
    pages.write(tmp_path / "prefix.html", "prefix.html", title="1.jpg", shown=shown, caption=caption, words=[[]])
    templates = Path(clipcap_jax.__file__).parent / "templates"
    made = {path.name for path in tmp_path.iterdir()}
    assert made | {"layout.html"} == {path.name for path in templates.glob("*.html")}
    for name in made:
        page = (tmp_path / name).read_text(encoding="utf-8")
        # Once, and before anything that it could forbid.
        head, *rest = re.split(r'<meta http-equiv="Content-Security-Policy"\s+content="(.*?)">', page)
        assert rest[:-1] == [POLICY]
        assert re.findall("<([a-z]+)", head) == ["html", "head", "meta", "meta"]
