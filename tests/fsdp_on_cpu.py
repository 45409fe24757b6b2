"""`iapo train` under FSDP on CPUs, for test_distributed.py: run by torchrun with the configuration's path.

accelerate turns FSDP on for accelerators only, so its state is told here what `accelerate launch --use_fsdp` would.
"""

import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from iapo import train
from iapo.cli import main


def turn_sharding_on(make_arguments=train.training_arguments):
    """After transformers' arguments, which reset accelerate's state, and before the trainer, which reads it."""

    def changed(*args):
        arguments = make_arguments(*args)
        Accelerator(cpu=True).state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        PartialState().distributed_type = DistributedType.FSDP
        return arguments

    train.training_arguments = changed


def refuse_whole_weights(gather=train.trained_weights):
    """trained_weights, of a model of which this process has a part only (but that the output layer stays gathered)."""

    def checked(policy):
        trained = [parameter for name, parameter in policy.named_parameters() if ".layers." in name and "lora_" in name]
        assert trained and all(isinstance(parameter, DTensor) for parameter in trained)
        return gather(policy)

    train.trained_weights = checked


if __name__ == "__main__":
    turn_sharding_on()
    refuse_whole_weights()
    sys.argv = ["iapo", "train", *sys.argv[1:]]
    main()
