"""One step of a trainer under torch.distributed.run, for test_processes.py: python one_step.py FOLDER JSON."""

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from conftest import as_arrays, flat, make_dataset, make_trainer, tiny_gpt2, train, trainable
from planting import find, with_edit

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
if "plant" in options:  # for tests/mutation.py
    function = find(options["plant"][0])
    function.__code__ = with_edit(function, *options["plant"][1:])
trainer = make_trainer(
    folder / "run",
    tiny_gpt2(**options["model"]),
    make_dataset(options["counts"]),
    privacy=options["privacy"],
    per_device_train_batch_size=options["per_device"],
    max_steps=options.get("steps", 1),
    **options.get("more", {}),
)
batches, recorder = train(trainer)
trainer.save_model()
evaluation = None
if "evaluate" in options:  # for test_evaluation.py: of the untrained model
    trainer.model.load_state_dict(tiny_gpt2(**options["model"]).state_dict())
    metrics = trainer.evaluate(make_dataset(options["evaluate"], seed=3))
    evaluation = [metrics["eval_loss"], metrics["eval_author_loss"]]
torch.save(
    {
        "authors": [[row.tolist() for row in samples] for batch in batches[0].microbatches for samples in as_arrays(batch)],
        "batch_size": batches[0].batch_size,
        "gradient": recorder.gradients[0],
        "weights": flat(trainable(trainer.model).values()),
        "wrapped_in": recorder.wrapped_in,
        "loss": recorder.logs[0]["loss"],
        "evaluation": evaluation,
    },
    folder / f"{trainer.args.process_index}.pt",
)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
