"""The training loop of TRL's `SFTTrainer` on given batches.

Its own image batches come from Qwen3-VL's processor, whose video part needs torchvision, so the caller provides batches
instead. Everything else is TRL's: its chunked head, its metrics, its optimizer loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import cpu_seconds

from coordexp.models.loading import Checkpoint


def seconds_per_sample(
    checkpoint: Checkpoint,
    collate: Callable[[Sequence[int]], dict[str, Any]],
    batches: Sequence[Sequence[int]],
    warm_steps: int,
    **settings: Any,
) -> tuple[float, float]:
    """Median by the wall over the steps after the warm ones, and by processors over all steps.

    `collate` makes the batch of some samples, `settings` are TRL's.

    Raises:
        ImportError: trl or datasets is not installed (benchmarks/requirements.txt).
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Starts when the batch of a step is asked for."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = self.began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.began = time.perf_counter(), cpu_seconds()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.started)
            self.started, self.cpu = now, cpu_seconds() - self.began

    clock, sizes = Clock(), list[int]()

    def next_batch(rows: list[dict[str, int]]) -> dict[str, Any]:
        batch = batches[rows[0]["step"]]  # TRL draws the order
        sizes.append(len(batch))
        return collate(batch)

    with TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=checkpoint.model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=len(batches),
                per_device_train_batch_size=1,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
                gradient_checkpointing=False,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"step": list(range(len(batches)))}),
            data_collator=next_batch,
            processing_class=checkpoint.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    per_sample = [seconds / size for seconds, size in zip(clock.seconds, sizes, strict=True)]
    return median(per_sample[warm_steps:]), clock.cpu / sum(sizes)
