"""How many sequences a replica runs at once, and how many times before a step."""

from dataclasses import dataclass

from lme_core.training.args import TrainingParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The batch of one optimizer step: `global = micro * accumulation * replicas`."""

    micro_batch_size: int
    """Sequences a replica runs at once."""
    gradient_accumulation_steps: int
    """Micro batches a replica runs per optimizer step."""
    global_batch_size: int
    """Sequences per optimizer step over all replicas."""
    num_replicas: int
    """Data-parallel replicas."""

    @classmethod
    def resolve(cls, parameters: TrainingParameters, num_replicas: int) -> "BatchPlan":
        """Work out the sizes that the run file leaves open.

        Any two of micro, accumulation and global give the third; a micro batch size alone means
        no accumulation; all three are checked against each other.

        Args:
            parameters: `training_parameters` of the run file.
            num_replicas: Data-parallel replicas, at least 1.

        Returns:
            The three sizes, whose product is exact.

        Raises:
            ValueError: If the sizes contradict each other or do not divide; the message names
                values that do.
        """
        micro = parameters.micro_batch_size
        accumulation = parameters.gradient_accumulation_steps
        total = parameters.global_batch_size
        if num_replicas < 1:
            raise ValueError(f"there must be at least 1 data-parallel replica, got {num_replicas}")
        if total is None:
            if micro is None:
                raise ValueError("`training_parameters.micro_batch_size` must be given")
            accumulation = 1 if accumulation is None else accumulation
            total = micro * accumulation * num_replicas
        elif micro is None:
            if accumulation is None:
                raise ValueError(
                    "`training_parameters.global_batch_size` alone does not determine the batch: "
                    "give `micro_batch_size` or `gradient_accumulation_steps` too"
                )
            micro = _divide(
                total, accumulation, "gradient_accumulation_steps", num_replicas, "micro_batch_size"
            )
        elif accumulation is None:
            accumulation = _divide(
                total, micro, "micro_batch_size", num_replicas, "gradient_accumulation_steps"
            )
        elif total != micro * accumulation * num_replicas:
            raise ValueError(
                f"`training_parameters.global_batch_size` is {total}, but `micro_batch_size` "
                f"{micro} * `gradient_accumulation_steps` {accumulation} * {num_replicas} "
                f"replicas = {micro * accumulation * num_replicas}; correct one, or leave one out"
            )
        return cls(
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            global_batch_size=total,
            num_replicas=num_replicas,
        )


def _divide(total: int, known: int, name: str, num_replicas: int, wanted: str) -> int:
    unit = known * num_replicas
    if total % unit == 0:
        return total // unit
    below, above = total // unit * unit, -(-total // unit) * unit
    nearest = f"{above}" if below == 0 else f"{below} or {above}"
    raise ValueError(
        f"`training_parameters.global_batch_size` is {total}, which is not a multiple of `{name}` "
        f"{known} * {num_replicas} replicas = {unit}, so there is no whole `{wanted}`; the nearest "
        f"global sizes are {nearest}"
    )
