# SPDX-License-Identifier: GPL-3.0-or-later
"""The server's side of web/: everything that the browser is sent, and the routes that it asks.

Read in this order:

==========  ================================================================================================
browser     ``BROWSER``: the observer that nodes hand to the patching engine
messages    messages to the browser tab that queued the run; blocks of the models that came into nodes
listeners   browser tabs that show our panels, and their open charts
status      what the last run of a node did, for its panel, or as the host's text where there is no panel
chart       ``SERIES``: the declaration of every line of a chart; means of a run's measures
routes      ``/gag/setup``, ``/gag/token``, ``/gag/blocks`` and ``/gag/listen``
==========  ================================================================================================

Messages go to the browser tab that queued the run, as ComfyUI's own messages do. A chart is measured only while its tab
says that the chart is open, and only measured values are sent. A run that nobody watches does nothing for charts.
"""
