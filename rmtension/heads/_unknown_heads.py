"""The error for a head that no rule knows: its tensors, and code that defines such a head."""

from collections.abc import Mapping
from pathlib import Path

from rmtension.heads._head_tensors import HeadTensors

_SHOWN = 12


def unknown_head(name: str, tensors: HeadTensors, width: int | None, *, has_steps: bool = False) -> str:
    """The error message for a checkpoint `name` whose head has these `tensors`; the code in it runs when pasted.

    `has_steps` says that the head may be that of a process reward model.
    """
    shown = ", ".join(f"{key} {list(shape)}" for key, shape in list(tensors.shapes.items())[:_SHOWN])
    more = f" and {len(tensors.shapes) - _SHOWN} more" if len(tensors.shapes) > _SHOWN else ""
    steps = (
        "If it scores the steps of a response, pass head=ProcessHead(marker) of rmtension.heads, with the text that "
        "ends each step (on the command line, --marker), and the output 'min', 'mean', 'last' or 'product'. For any "
        "other head, define what it computes,"
        if has_steps
        else "Define what the head computes,"
    )
    return (
        f"{name}: expected a head that a rule knows (docs/kinds.md), got the tensors {shown}{more}. {steps} with the "
        "formula of the model's own code in the last line of the class, and pass it:\n"
        f"{_code(name, tensors.shapes, tensors.held, width)}\n"
        "To read activations only, use RewardHead.from_language_model."
    )


def _code(name: str, shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, object], width: int | None) -> str:
    matrices = [key for key, shape in shapes.items() if len(shape) == 2 and shape[1] == width]
    key = (matrices or list(shapes))[0]
    path = held[key]
    if isinstance(path, Path):
        tensor, again = f"safe_open({str(path)!r}, 'pt').get_tensor({key!r})", f"from_pretrained({name!r}"
    else:
        tensor, again = f"model.state_dict()[{key!r}].clone()", "from_classifier(model"
    return (
        "import torch; from safetensors import safe_open\n"
        "from rmtension import RewardHead; from rmtension.heads import Head\n"
        "class OwnHead(Head):\n"
        "    def __init__(self): super().__init__(); "
        f"self.w = torch.nn.Buffer({tensor})\n"
        "    def read(self, last, prompt_last): return (last @ self.w.T)[:, :1]\n"
        f"head = RewardHead.{again}, head=OwnHead())"
    )
