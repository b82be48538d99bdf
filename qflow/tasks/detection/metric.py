"""Mean average precision (mAP) as COCO evaluates it, computed by pycocotools on the original pictures.

pycocotools is the reference: its figures are those of papers and of model zoos, and one run of it gives the mAP by
class and by size as well. torchmetrics calls it for the same figures, and adds a dependency.

mAP is no mean over pictures: a picture has no score of its own. Its noise is therefore not known, and what needs a
score a sample is refused or left out (`search.early_stop`, the gate's rules on the worst sample and class).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from qflow.core.errors import ConfigError, DataError, NotFiniteError
from qflow.tasks.detection.annotations import read
from qflow.tasks.detection.boxes import to_picture
from qflow.tasks.detection.data import Batch

Found = Mapping[str, Tensor]
"""Of one picture: `boxes` [K, 4] (left, top, right, bottom in pixels of the input), `scores` [K], `labels` int [K]."""
Adapter = Callable[[Any, tuple[int, int]], Sequence[Found]]
"""From a model's outputs and (height, width) of its input to what was found, a picture each."""
SIZES = ("small", "medium", "large")  # up to 32 x 32 pixels, up to 96 x 96, and larger
MOST = 2  # place of 100 detections a picture among COCO's limits 1, 10, 100


class MeanAP:
    """mAP over IoU 0.50 to 0.95; `details` are mAP at 0.50 and 0.75, by size and by class."""

    name: ClassVar[str] = "map"
    direction: ClassVar[str] = "maximize"
    needs_labels: ClassVar[bool] = True

    def __init__(
        self, adapter: Adapter | None, annotations: str | None, labels: str | Sequence[int] | None = None
    ) -> None:
        """`annotations` is the COCO file with the categories.

        `labels` says what the model's labels are: None for the categories in the order of their ids from 0 on, "id" for
        the ids themselves, or the id of each label in turn. Raises ConfigError.
        """
        if importlib.util.find_spec("pycocotools") is None:
            raise ConfigError("mAP needs pycocotools, but it is not installed. Run pip install 'qflow[detection]'.")
        if not callable(adapter):
            raise ConfigError(
                "An adapter turns outputs into boxes, but got none. Name one: "
                "task.metric.adapter._target_=qflow.tasks.detection.adapters.UltralyticsBoxes."
            )
        if annotations is None:
            raise ConfigError("Categories are in an annotation file, but got none. Set task.data.annotations.")
        self.adapter, self.categories = adapter, read(annotations).categories
        if isinstance(labels, str):
            if labels != "id":
                raise ConfigError(f"task.metric.labels is id, a list of ids or null, but got {labels}. Write id.")
            self.ids: Sequence[int] | None = None
        else:
            self.ids = list(self.categories) if labels is None else [int(label) for label in labels]
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._pictures: list[int] = []
        self._truths: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []
        self._precision: Any = None

    def update(self, outputs: Any, batch: Batch) -> None:
        """Take what the model found on a batch. Raises ConfigError for what an adapter must not return."""
        images, truths = batch
        found = self.adapter(outputs, (images.shape[-2], images.shape[-1]))
        if len(found) != len(truths):
            raise ConfigError(f"An adapter returns boxes a picture, {len(truths)}, but got {len(found)}. Correct it.")
        for one, truth in zip(found, truths, strict=True):
            index = int(truth["index"])
            self._pictures.append(index)
            parts = (truth["boxes"], truth["categories"], truth["crowd"], truth["areas"])
            for box, category, crowd, area in zip(*(part.tolist() for part in parts), strict=True):
                self._truths.append(_annotation(index, category, box, area, iscrowd=int(crowd)))
            boxes = to_picture(one["boxes"].detach().cpu(), truth["place"].cpu())
            scores = one["scores"].detach().cpu().double()
            if bool(boxes.isnan().any()) or not bool(scores.isfinite().all()):
                raise NotFiniteError("Boxes and scores are finite, but got NaN or inf. Check the adapter.")
            boxes[:, 2:] -= boxes[:, :2]
            ids = self._ids(one["labels"].detach().cpu())
            for box, score, category in zip(boxes.tolist(), scores.tolist(), ids, strict=True):
                self._found.append(_annotation(index, category, box, box[2] * box[3], score=score))

    def _ids(self, labels: Tensor) -> list[int]:
        """The category ids of a model's labels."""
        if self.ids is None:
            return [int(label) for label in labels]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.ids):
            raise ConfigError(
                f"A label is one of {len(self.ids)} categories, 0 to {len(self.ids) - 1}, but got {int(labels.max())}. "
                "If labels are category ids, set task.metric.labels=id."
            )
        return [self.ids[int(label)] for label in labels]

    def compute(self) -> float:
        """The mAP of all pictures since `reset`. Raises DataError if they have no boxes."""
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            evaluation = COCOeval(self._coco(self._truths), self._coco(self._found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        self._precision = evaluation.eval["precision"][..., MOST]  # IoU, recall, category, size
        value = _mean(self._precision[:, :, :, 0])
        if np.isnan(value):
            raise DataError("mAP needs boxes to find, but got none in the evaluated pictures. Check the annotations.")
        return value

    def details(self) -> dict[str, float]:
        """Return mAP at IoU 0.50 and 0.75, by size, and by class; NaN where there are no boxes."""
        found = self._precision
        parts = {"map50": found[0, ..., 0], "map75": found[5, ..., 0]}
        parts |= {size: found[..., 1 + i] for i, size in enumerate(SIZES)}
        parts |= {f"class/{name}": found[:, :, k, 0] for k, name in enumerate(self.categories.values())}
        return {name: _mean(part) for name, part in parts.items()}

    def _coco(self, annotations: Sequence[dict[str, Any]]) -> Any:
        from pycocotools.coco import COCO

        made = COCO()
        made.dataset = {
            "images": [{"id": index} for index in self._pictures],
            "categories": [{"id": key} for key in self.categories],
            # ids from 1 on: 0 means unmatched there
            "annotations": [{"id": k, **one} for k, one in enumerate(annotations, 1)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            made.createIndex()
        return made


def _annotation(image: int, category: int, box: list[float], area: float, **more: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0, **more}


def _mean(precision: Any) -> float:
    """The mean of what was measured; COCO writes -1 where there are no boxes. NaN if there is nothing."""
    measured = precision[precision > -1]
    return float(np.mean(measured)) if measured.size else float("nan")
