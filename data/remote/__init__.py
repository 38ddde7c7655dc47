"""What lies in a bucket or on a hub, read through a folder of this machine, and written from one. Needs the extra `remote` when it is used.

address.py    what an address is, and where its folder on this machine is
store.py      the objects under an address: listed, read, written and removed, again and again until it works
tree.py       a folder of this machine with the names and sizes of what lies at an address, filled as it is read
"""
