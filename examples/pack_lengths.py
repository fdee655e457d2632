"""What each way of batching wastes, and a plan of packs for rows of any reader: python pack_lengths.py"""

import numpy as np

import codeact

rng = np.random.default_rng(0)
lengths = np.minimum(rng.lognormal(5.3, 0.9, 100_000).astype(int) + 1, 2048)  # tokens of each row

for algorithm in ("next_fit", "ffd", "bfd"):
    packs = codeact.pack(lengths, capacity=2048, algorithm=algorithm)
    print(f"{algorithm:9} {len(packs):,} packs, {packs.fill:.2%} full; no plan has fewer than {packs.lower_bound:,}")

batches = rng.permutation(lengths)[: len(lengths) // 16 * 16].reshape(-1, 16)
padded = batches.max(1).sum() * 16
print(f"batches of 16 in random order: {1 - batches.sum() / padded:.1%} of what is computed is padding")

members = packs[0]  # the rows of the first pack, positions in `lengths`
assert lengths[members].sum() <= 2048
