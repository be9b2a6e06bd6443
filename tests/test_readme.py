"""What the README shows works as it is written."""

import re

from conftest import ROOT


def test_the_librarys_ten_lines_run(digits):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(code.replace("shards/digits", digits), names)
    batch = names["batch"]
    assert batch.step == 99 and batch.images.shape == (64, 3, 32, 32) and len(batch.keys) == len(batch.labels) == 64
    assert all(re.fullmatch(r"train/\d{8}", key) for key in batch.keys)
    names["stream"].close()
