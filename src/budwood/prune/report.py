"""What a session reports about its last call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False, repr=False)
class ImageReport:
    """What was kept of one image or video.

    Its tokens in the prompt are *candidates*, from which ``keep`` are kept, and *fixed* tokens,
    which always stay, such as newlines. A video is one entry with the tokens of all its frames,
    frame by frame. Printed, a report shows all three counts.

    Attributes:
        kept: kept tokens, int64, shape (n_after,), sorted.
        n_before: candidates.
        n_after: kept candidates; all of them where there are no more than were asked for.
        n_fixed: fixed tokens, beside the candidates.
        n_unpruned: tokens that the LLM sees without pruning, beside the fixed ones: the candidates,
            but for ``adav-official``, whose candidates are whole crops, padding included.
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
    n_unpruned: int
    split: Split
    saliency: Tensor | None
    relevance: Tensor | None
    row: int
    image: int
    grid: tuple[int, int] | None
    question: tuple[int, ...]
    boxes: Tensor
    placed: Callable[[tuple[int, int]], Tensor]
    kind: str = "image"
    frames: int = 1

    def __repr__(self) -> str:
        return (
            f"ImageReport({self.kind} {self.image} in row {self.row}: {self.n_before} candidates, "
            f"{self.n_after} kept, {self.n_fixed} fixed)"
        )

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
        n_cached_images: images that ``past_key_values`` held already. They stay as they were pruned
            in their turn, and the report is about the others.

    Args:
        report: one entry per image and video, in the order of the batch.
        usable: on a GPU, whether each image's features were finite, one bool tensor each.
        timing: of the call.
        origin: of the call.
        whole_video: whether there was a video.
        n_cached_images: images in the cache.
    """

    def __init__(
        self,
        report: Sequence[ImageReport] = (),
        usable: Sequence[Tensor] = (),
        timing: Timing | None = None,
        origin: Tensor | None = None,
        whole_video: bool = False,
        n_cached_images: int = 0,
    ) -> None:
        self.timing = timing or Timing()
        self.origin = origin
        self.whole_video = whole_video
        self.n_cached_images = n_cached_images
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
