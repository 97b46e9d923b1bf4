"""Tokens that stand for places mean what the families' own processors say."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.florence2 import processing_florence2
from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

from saccade_client.grounding import Place, find


@pytest.mark.parametrize(("first", "last"), [(44, 863), (70, 70), (66, 80), (3, 995), (0, 1023)])
def test_cells_of_kosmos_2(first: int, last: int) -> None:
    tokens = f"<patch_index_{first:04}><patch_index_{last:04}>"
    (place,) = find(f"<phrase> a man</phrase><object>{tokens}</object> smiles")
    corners = patch_index_to_coordinate(first, last, 32)
    assert place.numbers == pytest.approx([32 * corner for corner in corners])
    assert (place.label, place.scale) == ("a man", 32)


def test_kosmos_2_may_write_several_boxes_of_a_phrase() -> None:
    tokens = (
        "<patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
        "<patch_index_0044><patch_index_0863>"
    )
    found = find(f"<phrase>dogs</phrase><object>{tokens}</object>")
    corners = (0.5, 0.5, 1.5, 1.5), (12.5, 1.5, 31.5, 26.5)
    assert found == [Place(each, "dogs", 32) for each in corners]


def test_bins_of_florence_2() -> None:
    text = "car<loc_52><loc_332><loc_932><loc_774>door<loc_450><loc_276><loc_554><loc_999>"
    found = find(text)
    bins = torch.tensor([[52, 332, 932, 774], [450, 276, 554, 999]])
    own = processing_florence2.Florence2PostProcessor.dequantize
    expected = own(SimpleNamespace(quantize_bins=(1000, 1000)), bins, (2000, 2000))
    doubled = [[2 * number for number in place.numbers] for place in found]
    assert doubled == expected.tolist()
    assert [(place.label, place.scale) for place in found] == [("car", 1000), ("door", 1000)]
