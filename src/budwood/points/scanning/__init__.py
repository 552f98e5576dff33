"""Find the objects in frames of a LiDAR, radar or depth camera, and name them.

``pipeline`` is the way from a frame to named boxes. Its steps are modules of their own: ``ground``,
``segments`` (clusters), ``tracks`` (over frames), ``naming``, ``rejection`` and ``boxes``.
"""
