"""The networks and their blocks, and the separator around a network, plain PyTorch.

>>> from tfswa_lab.models import TFSWAUNet
>>> TFSWAUNet().get_num_parameters()
15404834
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention": [
            "FrequencySequenceAttention",
            "MultiHeadAttention",
            "ShiftedWindowAttention",
            "TemporalSequenceAttention",
        ],
        "mask_resunet": ["MaskResUNet"],
        "rotary": ["RotaryAttention"],
        "separator": ["Separator", "build_separator", "output_channels"],
        "storage": ["load_separator", "save_separator"],
        "tf_locoformer": ["TFLocoformer", "TFLocoformerBlock"],
        "tfswa_block": ["TFSWABlock"],
        "tfswa_resunet": ["TFSWAModule", "TFSWAResUNet"],
        "tfswa_unet": ["TFSWAUNet"],
    },
)
