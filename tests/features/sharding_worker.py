"""A worker process of the tests of sharding: encodes one shard of a small catalogue slowly."""

import sys
from pathlib import Path

from features.sharding import Shard, encode_shard
from tests.features.small_encoder import SMALL, SmallEncoder, small_catalogue


def main(folder: Path, shard: str, delay_s: float) -> None:
    catalogue = small_catalogue(folder / f"pictures-{shard[0]}", 60, repeat_every=5)
    report = encode_shard(
        SmallEncoder(delay_s=delay_s),
        catalogue,
        "image",
        folder / "blocks",
        config=SMALL,
        shard=Shard.parse(shard),
    )
    (folder / "kept").write_text(str(report.kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
