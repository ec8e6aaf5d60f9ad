"""Weights whose names in checkpoints differ from those in the model."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

__all__ = ["accept_checkpoint_names"]


def accept_checkpoint_names(model: PreTrainedModel) -> None:
    """Lets a model's ``load_state_dict`` also accept the weight names that ``save_pretrained`` writes.

    ``from_pretrained`` accepts them. The Trainer does not when it resumes: it leaves such weights unchanged and warns
    (huggingface/transformers#43701). Pythia's head is an example.
    """
    renamings = [t for t in get_model_conversion_mapping(model, add_legacy=False) if isinstance(t, WeightRenaming)]

    def rename(module, state_dict, *_):
        for saved in list(state_dict):
            name = saved
            for renaming in renamings:
                name, _pattern = renaming.rename_source_key(name)
            state_dict[name] = state_dict.pop(saved)

    if renamings:
        model.register_load_state_dict_pre_hook(rename)
