"""What a session reports about its last call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from budwood.errors import InputError
from budwood.prune.methods.base import Split


@dataclass(frozen=True)
class Timing:
    """Time that the last call spent before the LLM ran.

    On a GPU these are the times to launch the work, unless ``attach(..., timing=True)``.

    Attributes:
        encode_ms: the vision encoder and projector.
        select_ms: saliency row, selection and cutting the prompt.
    """

    encode_ms: float = 0.0
    select_ms: float = 0.0


@dataclass(frozen=True, eq=False)
class ImageReport:
    """What was kept of one image or video.

    Tokens are its *candidates*: newlines, which always stay, are not counted. A video is one entry
    with the tokens of all its frames, frame by frame.

    Attributes:
        kept: kept tokens, int64, shape (n_after,), sorted.
        n_before: tokens before.
        n_after: tokens after; all of them where the image has no more than were asked for.
        n_fixed: tokens beside them that always stay, such as newlines.
        split: how the budget was divided.
        saliency: score per token, float32, shape (n_before,); None if the method uses none.
        relevance: text-to-image score per token, likewise.
        row: row of the batch.
        image: its number in the whole call, images and videos counted together in prompt order.
        grid: rows and columns of the tokens, of each frame, if they form one raster; else None.
        question: positions in the row that counted as the question.
        boxes: x0, y0, x1, y1 of each token in the picture or frame that the encoder saw, as
            fractions of its size in [0, 1], float32, shape (n_before, 4).
        placed: gives the boxes in the original picture; see :meth:`boxes_on`.
        kind: ``"image"`` or ``"video"``.
        frames: of a video, as the encoder merges them (two of the file's in Qwen models); else 1.
    """

    kept: Tensor
    n_before: int
    n_after: int
    n_fixed: int
    split: Split
    saliency: Tensor | None
    relevance: Tensor | None
    row: int
    image: int
    grid: tuple[int, int] | None
    question: tuple[int, ...]
    boxes: Tensor = field(repr=False)
    placed: Callable[[tuple[int, int]], Tensor] = field(repr=False)
    kind: str = "image"
    frames: int = 1

    @property
    def kept_by_frame(self) -> list[Tensor]:
        """Kept tokens of each frame, counted from the frame's first, int64."""
        per_frame = self.n_before // self.frames
        frame = self.kept // per_frame
        return [self.kept[frame == i] % per_frame for i in range(self.frames)]

    @property
    def kept_all(self) -> bool:
        """Whether no token was dropped."""
        return self.n_after == self.n_before

    def boxes_on(self, image_size: tuple[int, int]) -> Tensor:
        """Boxes in the original picture, which the image processor may have cropped or padded.

        Needs ``attach(..., processor=...)`` where that is so (LLaVA). Without it the encoder is
        taken to have seen the whole picture, stretched. Tiles of InternVL are arranged by the size
        of the picture, so ``boxes`` alone is a guess there.

        Args:
            image_size: height and width of the original picture in pixels.

        Returns:
            x0, y0, x1, y1 as fractions of its size in [0, 1], float32, shape (n_before, 4).
        """
        return self.placed(image_size)


class Call:
    """What one call of the model did.

    Attributes:
        timing: zeros if the call had no images.
        origin: position in the given prompt of each token that the LLM saw, -1 for padding, int64,
            shape (batch, n_kept); None if the call had no images.
        whole_video: whether the call had a video, all of whose tokens were kept.

    Args:
        report: one entry per image and video, in the order of the batch.
        usable: on a GPU, whether each image's features were finite, one bool tensor each.
        timing: of the call.
        origin: of the call.
        whole_video: whether there was a video.
    """

    def __init__(
        self,
        report: Sequence[ImageReport] = (),
        usable: Sequence[Tensor] = (),
        timing: Timing | None = None,
        origin: Tensor | None = None,
        whole_video: bool = False,
    ) -> None:
        self.timing = timing or Timing()
        self.origin = origin
        self.whole_video = whole_video
        self._report, self._usable = list(report), list(usable)

    @property
    def report(self) -> list[ImageReport]:
        """What was kept, one entry per image and video in the order of the batch.

        Raises:
            InputError: on a GPU, where it is not waited for in the call: features had NaN.
        """
        for number, fine in enumerate(self._usable):
            if not fine:
                raise InputError(
                    f"features or saliency of image {number} are not finite; check the image, the "
                    "dtype (float16 overflows) and the weights"
                )
        return self._report
