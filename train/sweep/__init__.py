"""Sweeps: many runs from one command, by any number of workers that share a folder and nothing else.

sweep.json                what was asked for: each run with its overrides and its config; command, commit, versions
changes.diff              what the code differed in from that commit
grown.json                runs that were added, by which commands
runs/NAME/                run folders; a name ends in a hash of the config
claims/NAME/              which worker has the run (`owner/`), its values where runs are compared (`compared.json`), its end (`outcome.json`)
trials/                   of a search: what was proposed
results.csv, .parquet     a line a run: the keys that differ, status, last metrics
compiled/, data/          compiled programs and tokenised corpora, shared by all runs
logs/                     what each of several workers on a machine says
"""
