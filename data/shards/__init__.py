"""A corpus tokenised into many files beforehand, by many processes, and read without looking at all of it.

    prepared.json            what there is: shards in order, sizes, checksums, fingerprints
    tokenizer/               the tokenizer that made the ids
    shard-00000/             tokens.bin and documents.npy as in a cache, the documents in the order of their hashes; shard.json

A shard is made of one piece of the source (some files, or a part of a large one), whoever makes it, so that its bytes do not hang on the
number of workers. As hashes are in order, what is held out of a shard is found by a binary search.
"""
