"""README's example of a method trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from helpers import batch_of, evaluation, fit, small

from distill.guidance import ClassifierFreeGuidance
from distill.optimization import Optimization
from distill.times import UniformTimes

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_new_method_of_the_readme_learns_from_its_guided_teacher() -> None:
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    exec(compile(code, "README.md", "exec"), names)
    teacher = small(num_classes=2)
    method = names["Imitation"](teacher, ClassifierFreeGuidance(2.0), UniformTimes(), Optimization(), evaluation())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    fit(method, [batch_of(number) for number in range(3)], 3)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in method.student.state_dict().items())
