"""The live view of a running model: a stream of events about its steps, and a page that draws them.

observation   the steps since somebody watches, as the steps' thread tells them
shadow        an LRU cache of as many slots over the same routes
snapshot      a sighting of a step as an event's JSON
feed          who watches; the first starts an observation, the last ends it
stream        the events over HTTP
page          the files in assets/ (page_files), under a strict content policy
"""
