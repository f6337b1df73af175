"""One run of a trainer: seeded, isolated from its caller, with an output folder that is written whole or not at all."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmtension._progress import shows_bars
from rmtension.errors import ModelError, OptionError, StorageError
from rmtension.models._portable import make_portable, warn_of
from rmtension.store._provenance import TRAINING_RECORD
from rmtension.store._work_folder import claim, locked


def require_package(package: str) -> Any:
    """Import `package`; raises a `ModelError` that tells how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelError(f"training: needs the package {package!r}. Run `pip install {package}`.") from error


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise `StorageError` unless `folder` is empty, or may be overwritten and was written by a training."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise StorageError(f"output_dir: {folder} is not empty. Name another folder, or pass overwrite=True.")
    if not (folder / TRAINING_RECORD).is_file():
        # Replacing a folder deletes it, so folders that this module did not write are never replaced.
        raise StorageError(
            f"output_dir: {folder} was not written by rmtension.training, so it is not replaced. Name another folder."
        )


def is_finished(folder: Path, options: Mapping[str, Any], **record: Any) -> bool:
    """Whether `folder` holds a finished training with these options and these entries of its record.

    Returns False if the folder holds no training. Raises `StorageError` that names the first difference, because such
    a model answers another question and may have been trained on pairs that are now held out. Entries that an older
    version did not write are not compared.

    Examples:
        >>> is_finished(Path("nothing"), {"seed": 0})
        False
    """
    if not (folder / TRAINING_RECORD).is_file():
        return False
    try:
        content = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
        recorded = {**content, **content.get("options", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{folder}: its {TRAINING_RECORD} is damaged ({error}). Name another folder.") from error
    for name, value in {**options, **record}.items():
        if name in recorded and recorded[name] != value:
            raise StorageError(
                f"{folder}: expected a model trained with {name}={value!r}, got one with {recorded[name]!r}. Name "
                "another folder, or pass overwrite=True."
            )
    return True


def digest_of_texts(texts: Sequence[str]) -> str:
    """The SHA-256 digest of texts in their order, in hexadecimal; `train_base_model` writes it to its record.

    Examples:
        >>> digest_of_texts(["a", "b"])[:8], digest_of_texts(["b", "a"])[:8]
        ('3554d2b8', '5cc385e8')
    """
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def digest_of_config(config: Any) -> str:
    """The SHA-256 digest of the fields of a config of transformers that differ from its defaults."""
    values = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def schedule(
    scratch: Path,
    seed: int,
    epochs: float,
    max_steps: int | None,
    learning_rate: float,
    warmup_steps: int,
    batch_size: int,
    progress: bool | None,
) -> dict[str, Any]:
    """The config fields that both trainers share."""
    return {
        "output_dir": str(scratch),
        "seed": seed,
        "data_seed": seed,
        "num_train_epochs": epochs,
        "max_steps": -1 if max_steps is None else max_steps,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "disable_tqdm": not shows_bars(progress),
        "logging_strategy": "steps",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def arguments(config_class: Any, extra: Mapping[str, Any] | None, **fields: Any) -> Any:
    """A trainer's config from our fields and the user's extra fields, which may not repeat ours."""
    taken = set(extra or {}) & set(fields)
    if taken:
        raise OptionError(f"trainer_options: {sorted(taken)} are set by other arguments of this call. Use those.")
    # transformers 5 renamed it.
    names = {field.name for field in dataclasses.fields(config_class)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    try:
        config = config_class(**{checkpointing: False, **fields, **(extra or {})})
    except (TypeError, ValueError) as error:
        raise OptionError(f"trainer_options: {config_class.__name__} refuses them: {error}") from error
    # One device per process: with several GPUs, a step would take several batches, and these trainers run one.
    if config.n_gpu > 1:
        config._n_gpu = 1
    return config


def run_trainer(
    trainer: Any, on_log: Callable[[str], object] | None = None, resume_from: Path | None = None
) -> dict[str, Any]:
    """Train with a progress bar that shows the losses, without the dicts that transformers prints.

    `on_log` is called with a line for every entry of the trainer's log. Returns the losses and the number of steps.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if self.training_bar is not None and (shown := _losses(logs)):
                self.training_bar.set_postfix(shown, refresh=False)

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            """Show no second bar."""

    class Lines(TrainerCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if on_log is not None and (shown := _losses(logs)):
                values = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                on_log(f"step {state.global_step} of {state.max_steps}: {values}")

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    trainer.add_callback(Lines)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    history = [{"step": entry["step"], **shown} for entry in trainer.state.log_history if (shown := _losses(entry))]
    return {"n_steps": trainer.state.global_step, "history": history}


def stop_after(patience: int) -> Any:
    """A callback that stops after `patience` evaluations without a better one, counting those before a resume too."""
    from transformers import EarlyStoppingCallback

    class Patience(EarlyStoppingCallback):  # type: ignore[misc]
        """As that of transformers; a training that had stopped when it was interrupted stops again."""

        @property
        def _is_over(self) -> bool:
            return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

        def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            super().on_train_begin(args, state, control, **options)
            control.should_training_stop |= self._is_over

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            # The trainer takes one step before it sees that it should stop.
            if self._is_over:
                control.should_evaluate = control.should_save = False

        on_epoch_end = on_step_end

    return Patience(patience)


def evaluate_at_the_end() -> Any:
    """A callback that evaluates and saves after the last step too, so that it can be selected."""
    from transformers.trainer_callback import TrainerCallback

    class End(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # By epochs, the end is evaluated anyway.
            if state.global_step >= state.max_steps and args.eval_strategy == "steps":
                control.should_evaluate = control.should_save = True

    return End()


def _losses(logs: Mapping[str, float] | None) -> dict[str, float]:
    """The losses and accuracies in an entry of a trainer's log, by the names that people read."""
    names = {"loss": "loss", "eval_loss": "validation loss", "eval_accuracy": "validation accuracy"}
    return {shown: logs[name] for name, shown in names.items() if name in logs} if logs else {}


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint that a trainer wrote into `folder`; None if there is none."""
    # The trainer writes its state last, so that a checkpoint without a readable one is incomplete.
    steps = {}
    for path in folder.glob("checkpoint-*"):
        with suppress(OSError, ValueError, KeyError):
            steps[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
    return steps[max(steps)] if steps else None


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a checkpoint with its tokenizer as safetensors, readable by transformers 4 and 5."""
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    warn_of(make_portable(folder, tokenizer), "training")


def write_record(folder: Path, **values: Any) -> None:
    """Write options, counts and versions as JSON into the folder of a checkpoint."""
    packages = ("rmtension", "torch", "transformers", "trl", "tokenizers")
    values["versions"] = {name: _version(name) for name in packages}
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (folder / TRAINING_RECORD).write_text(text + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def new_folder(
    output_dir: str | Path,
    overwrite: bool,
    work: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Path, Path]]:
    """Yield an empty folder that becomes `output_dir` on success, and a scratch folder.

    A failure removes both, but not `work`, which serves as the scratch folder if it is given. `inputs` are what a
    training in `work` depends on.
    """
    target = Path(output_dir)
    require_free(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise StorageError(f"output_dir: {target} could not be made ({error}). Name another folder.") from error
    try:
        folder, scratch = temporary / "model", temporary / "scratch"
        folder.mkdir()
        with ExitStack() as stack:
            if work is None:
                scratch.mkdir()
            else:
                scratch = Path(work)
                stack.enter_context(locked(scratch))
                claim(scratch, {name: str(value) for name, value in (inputs or {}).items()})
            yield folder, scratch
            replaced = temporary / "replaced"  # deleted with `temporary`, after the new folder has replaced it
            if target.exists():
                target.rename(replaced)
            try:
                folder.rename(target)
            except OSError:
                if replaced.exists():
                    replaced.rename(target)
                raise
        if work is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed every generator, and restore the caller's random states and the libraries' settings on exit."""
    import huggingface_hub
    import transformers

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator of the caller
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    telemetry = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            transformers.set_seed(seed)
            # transformers warns that the head is missing, which is intended; other missing weights raise.
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            # Training on local files should send no usage statistics.
            huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = telemetry
