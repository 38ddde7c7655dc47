"""Run folders in a store: trained in on this machine, pushed as they grow, pulled by whoever goes on or reads.

ownership.py   the one owner of a run folder in a store
parts.py       what of a run folder lies in a store, and in which order it goes there
mirror.py      a run folder of this machine pushed to its store while it trains
pulling.py     what a store holds of a run brought to this machine, to go on with it
reading.py     a run in a store through a folder of this machine, to read it
"""
