"""The worst mistakes of an evaluation, with their pictures out of the shards, wherever these lie."""

import base64
import io

from dist_train.errors import UserError
from dist_train.index import SplitIndex
from dist_train.picture_header import read_header
from dist_train.picture_plots import HARD_PIXELS, cell, thumbnail
from dist_train.store import Store

MAX_MISTAKES = 24  # shown
EMBED_BYTES = 40_000  # larger pictures are embedded as small copies
THUMBNAIL = 256  # pixels, longer side of such a copy


def worst_mistakes(
    evaluation: dict, classes: list[str], split: SplitIndex | None, has_pictures: bool = True
) -> tuple[list[dict], str]:
    """The mistakes with the largest losses, worst first, and a remark where pictures are missing.

    evaluation: what `evaluate.write_evaluation` wrote; split: the one it was made on, None where it is not there; has_pictures:
    False of a table. A row has sample, label, predicted, probability, loss, name, picture (a data URI or None) and small.
    """
    rows = [
        {
            "sample": m["sample"], "label": classes[m["label"]], "predicted": classes[m["predicted"]],
            "probability": m.get("probability"), "loss": m.get("loss"), "picture": None, "name": "", "small": False,
        }
        for m in evaluation.get("mistakes", [])[:MAX_MISTAKES]
    ]  # fmt: skip
    if split is None or not rows:
        return rows, ""
    stored = split.stored  # samples are numbered as they lie in the shards, also where a fold was evaluated
    try:
        names = stored.names()
        store = Store(stored) if has_pictures else None
    except UserError as error:
        return rows, f"No {'pictures' if has_pictures else 'names'}: {error}"
    left_out = ""
    for row in rows:
        try:
            if not 0 <= row["sample"] < stored.num_samples:
                raise UserError(f"there is no sample {row['sample']}")
            row["name"] = names[row["sample"]] if names else ""
            if store:
                row["picture"], row["small"] = picture_uri(store.payload(row["sample"]))
        except UserError as error:
            left_out = left_out or str(error).splitlines()[0]
            if stored.remote:  # asking a server that does not answer takes minutes each time
                break
    if not store:
        return rows, f"Samples are numbered: {left_out}" if left_out else ""
    num_missing = sum(row["picture"] is None for row in rows)
    why = "" if stored.remote else "the shards have changed since: "
    return rows, f"{num_missing} pictures are left out: {why}{left_out}" if left_out else ""


def picture_uri(data: bytes) -> tuple[str | None, bool]:
    """(data URI of a picture, whether it is small enough to be shown with hard pixels); (None, False) if it is none.

    JPEG, PNG and WebP pass through; other kinds, large files, turned ones and those of 16 bits become small copies, decoded as for
    the network.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            small, kind = max(image.size) <= HARD_PIXELS, image.format
            is_plain = read_header(data).orientation == 1 and not image.mode.startswith("I")
            if kind not in ("JPEG", "PNG", "WEBP") or len(data) > EMBED_BYTES or not is_plain:
                return cell(thumbnail(data, THUMBNAIL)).uri, small
    except Exception:  # whatever PIL cannot open is not shown
        return None, False
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}", small
