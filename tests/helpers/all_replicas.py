"""All replicas, in the order of the table of kinds."""

import body_replicas
import encoder_replicas
import gated_replicas
import linear_replicas
import process_replicas
import refused_replicas
import token_replicas
from replicas import Replica

ALL: list[Replica] = [
    *linear_replicas.PLAIN,
    *linear_replicas.LAYERED,
    *gated_replicas.GATED,
    *token_replicas.TOKENS,
    *process_replicas.PROCESS,
    *encoder_replicas.ENCODERS,
    *body_replicas.BODIES,
]
REFUSED: list[Replica] = refused_replicas.REFUSED
assert len({replica.kind for replica in ALL}) == len(ALL)
