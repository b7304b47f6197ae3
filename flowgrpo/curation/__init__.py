"""Curated sets: image-text pairs that rewards chose, made by ``flowgrpo curate``.

dataset.py     the reader: a split, the pairs, their pictures and fingerprints
options.py     options of the command
sources.py     folders, webdataset shards, data sets of the Hub, curated sets -> samples
pictures.py    decode, crop and resize; content hash; thumbnails
splits.py      prompt -> train, validation or test
store.py       what is known so far, in SQLite, until the set is finished
curate.py      the command: samples -> scores -> selection -> folder
report.py      report.html, histograms.png and the table
"""
