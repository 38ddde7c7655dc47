"""`launch.py prepare`: a corpus tokenised into shards by any number of processes on any number of machines that share a folder.

job.json     what is prepared, for the workers of every machine
claims/      which worker has which shard (`plait.train.run_folder.owner`); gone when all are there
"""
