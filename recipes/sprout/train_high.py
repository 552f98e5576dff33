"""Stage 4 of sprout: high-resolution pictures and small ones, from the weights of stage 3 on.

Tower, projector, newline and LoRA learn from questions alone, as in stage 3. Each step has several
high-resolution pictures in the LLaVA-NeXT layout and a batch of small ones in the LLaVA layout, so
that one set of weights answers in both. The first high-resolution pictures lack most of the patches
between objects, which is faster.

    python recipes/sprout/train_high.py --start runs/llava --out runs/high

With `torchrun --nproc-per-node 2 -- recipes/sprout/train_high.py …` two processes share the
pictures of a step. The first one writes checkpoints and the log, which then holds its own half.

Rates stay constant until `--steps` less the decay is reached; a run that was stopped goes on with
larger `--steps` as if it had had them from the start.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import MasterWeights, MergedLora, Ranks, Run, trapezoid
from exercises import Exercises
from packing import collate
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from train_llava import accuracies, build, loss_and_hits
from transformers import PreTrainedTokenizerBase

from budwood.sprout.model import PARTS, load_tokenizer

SMALL_SEEN = 10_000
"""Stage 3 has seen fewer small pictures than this; its later ones are new."""


def load_start(model: Any, folder: Path) -> None:
    """Load projector, newline (if there is one) and LoRA from a folder of shipped weights."""
    projector = load_file(folder / PARTS[1])
    newline = projector.pop("image_newline", None)
    model.model.multi_modal_projector.load_state_dict(projector)
    if newline is not None:
        model.model.image_newline.data.copy_(newline)
    lora = load_file(folder / PARTS[2])
    named = {name.replace(".weight", ".default.weight"): p for name, p in lora.items()}
    _, unknown = model.model.language_model.load_state_dict(named, strict=False)
    assert not unknown, unknown[:3]


def learning(model: Any, args: argparse.Namespace) -> list[dict]:
    """Parameters that learn, with their rates; the tower's up to the layer that is read."""
    inner = model.model
    tower = inner.vision_tower.encoder.layers[:-1]
    tower.requires_grad_(True)
    lora = [p for n, p in inner.language_model.named_parameters() if "lora_" in n]
    return [
        {"params": list(inner.multi_modal_projector.parameters()), "lr": args.projector_lr},
        {"params": [inner.image_newline], "lr": args.projector_lr},
        {"params": lora, "lr": args.lora_lr},
        {"params": list(tower.parameters()), "lr": args.tower_lr},
    ]


def train(
    model: Any, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, args: argparse.Namespace
) -> None:
    """Train up to `args.steps`, from the last checkpoint if there is one."""
    masters = MasterWeights(learning(model, args))
    run = Run(args.out, {"model": model.model}, [masters.optim])
    masters.resume()
    lora = MergedLora(model.model.language_model)
    high = batches(tokenizer, "high", 0, 1, args.high, ranks, run.step, args.steps)
    small = batches(
        tokenizer,
        "questions",
        SMALL_SEEN,
        args.small // ranks.number,
        ranks.number,
        ranks,
        run.step,
        args.steps,
    )
    losses: list[float] = []
    seen: dict[str, list[Tensor]] = {"high": [], "small": []}
    while run.step < args.steps:
        run.scale_lr(trapezoid(run.step, args.steps, 20, args.decay))
        lora.merge()
        share = 1 / (args.high + 1)
        parts = [("high", share, next(high)) for _ in range(args.high // ranks.number)]
        parts.append(("small", share / ranks.number, next(small)))
        for layout, weight, batch in parts:
            loss, hits = loss_and_hits(model, batch)
            (loss * weight).backward()
            losses.append(loss.item())
            seen[layout].append(hits)
        lora.hand_down()
        ranks.add_gradients(masters.live)
        masters.step()
        run.step += 1
        stopped = ranks.any((args.out / "stop").exists())
        if run.step % 10 == 0:
            if ranks.own == 0:
                right = {layout: accuracies(torch.cat(hits)) for layout, hits in seen.items()}
                run.log(loss=round(sum(losses) / len(losses), 3), **right)
            losses, seen = [], {"high": [], "small": []}
        if (run.step % 20 == 0 or stopped) and ranks.own == 0:
            run.save()
            export(model, args.out)
        if stopped:
            return


def batches(
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    first: int,
    size: int,
    per_step: int,
    ranks: Ranks,
    step: int,
    steps: int,
) -> Any:
    """This process's batches of a stage's pictures, as if every step was run.

    Args:
        tokenizer: sprout's.
        stage: "high" or "questions".
        first: the picture that the first step begins with.
        size: pictures a batch.
        per_step: batches a step, of all processes together.
        ranks: the processes, which take batches in turn.
        step: the step to begin with.
        steps: the step to end before.
    """
    each = size * per_step
    data = Exercises(tokenizer, stage, first + steps * each, first + step * each, size)
    own = [i for i in range(len(data)) if i // size % ranks.number == ranks.own]
    return iter(
        DataLoader(Subset(data, own), size, num_workers=1, prefetch_factor=4, collate_fn=collate)
    )


def export(model: Any, out: Path) -> None:
    """Write the weights that ship, in bfloat16."""
    inner = model.model
    projector = inner.multi_modal_projector.state_dict() | {"image_newline": inner.image_newline}
    lora = {
        n.replace(".default", ""): p
        for n, p in inner.language_model.named_parameters()
        if "lora_" in n
    }
    for file, state in zip(PARTS, (inner.vision_tower.state_dict(), projector, lora), strict=True):
        save_file({n: p.detach().bfloat16().contiguous() for n, p in state.items()}, out / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, required=True, help="folder with stage 3's weights")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an unfinished run there goes on"
    )
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--high", type=int, default=6, help="high-resolution pictures a step")
    parser.add_argument("--small", type=int, default=4, help="small pictures a step")
    parser.add_argument("--decay", type=float, default=0.3, help="last part of the steps")
    parser.add_argument("--projector-lr", type=float, default=2e-4)
    parser.add_argument("--lora-lr", type=float, default=3e-4)
    parser.add_argument("--tower-lr", type=float, default=5e-5)
    args = parser.parse_args()
    ranks = Ranks()
    if args.high % ranks.number or args.small % ranks.number:
        parser.error(f"--high and --small must be multiples of the {ranks.number} processes")

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = build(args.start / PARTS[0], tokenizer, high_resolution=True)
    load_start(model, args.start)
    train(model, tokenizer, ranks, args)
    if ranks.own == 0:
        export(model, args.out)


if __name__ == "__main__":
    main()
