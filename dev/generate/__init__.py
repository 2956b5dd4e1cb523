# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules that write files of the repository.

- ``texts``: locales and the lists in the help pages, from the nodes' schemas (``python dev.py texts``)
- ``schemas``: the inputs and outputs that saved workflows depend on (``python dev.py schemas``)
- ``pages``: ``docs/models.md`` and ``docs/composition.md`` (``python dev.py docs``), with ``model_table``,
  ``composition_table`` and ``junit_results``
- ``demo_pictures``, ``node_pictures``, ``thumbnails``, ``artwork``: pictures (``python dev.py run generate.NAME``)
"""
