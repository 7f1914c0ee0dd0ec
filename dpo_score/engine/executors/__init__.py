"""Who computes the blocks of a run: this process, one share of a job array, or workers of a Ray cluster.

In come a configuration and a context; out come committed blocks, the same bytes whoever computed them. It imports the
engine's own modules, and Ray only inside ray.py; the engine's modules do not import it (watch.py, which runs again and
again, is the exception).
"""
