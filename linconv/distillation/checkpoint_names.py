"""Names of weights in checkpoints, where they are not those of the model."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

__all__ = ["accept_checkpoint_names"]


def accept_checkpoint_names(model: PreTrainedModel) -> None:
    """Lets ``load_state_dict`` of a model take its weights by the names that ``save_pretrained`` gives them, too.

    ``from_pretrained`` does so itself. The Trainer does not when it resumes: it leaves such weights as they were, and
    warns (huggingface/transformers#43701). The head of Pythia is one.
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
