"""What is found out once a process does not depend on what the first call stands in."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bigkernels.program import _memory_words


@pytest.mark.parametrize("inside", [FakeTensorMode, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("known", [_memory_words.knows_versions, _memory_words.knows_tensors])
def test_the_first_call_may_stand_anywhere(known, inside):
    if not known():
        pytest.skip("this interpreter or torch keeps other memory")
    again = known.__wrapped__
    with inside():
        assert _memory_words._once(again)()
