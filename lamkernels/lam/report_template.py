"""The pages of the reports, jinja2 templates; figures and numbers of the demonstration's come from ``report.py``."""

BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %}</title>
<style>
  :root { color-scheme: light; }
  body { font: 16px/1.55 system-ui, sans-serif; color: #22272e; max-width: 62rem; margin: 2.5rem auto; padding: 0
  1.25rem; }
  h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
  h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
  p { max-width: 46rem; }
  .lead { color: #57606a; margin-top: 0; }
  .verdict { border-left: 4px solid #2166ac; background: #f3f7fb; padding: .8rem 1.1rem; margin: 1.4rem 0; max-width:
  none; }
  .verdict.apart { border-color: #b2182b; background: #fdf5f3; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: .42rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap; }
  th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
  td:last-child { color: #57606a; font-size: .9rem; white-space: normal; }
  thead th { border-bottom: 2px solid #22272e; }
  img { width: 100%; height: auto; display: block; margin: .6rem 0; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .92rem; }
  dt { color: #57606a; } dd { margin: 0; }
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

TEMPLATE = """{% extends "base" %}
{% block title %}lamkernels demo: {{ results.config.data.game }}{% endblock %}
{% block body %}
<h1>One latent action model, trained twice</h1>
<p class="lead">{{ results.config.data.game|capitalize }}, {{ "{:,}".format(results.data.trained_transitions) }}
  transitions,
{{ results.config.training.steps }} steps, one seed: once with the bottleneck in plain torch (stock),
once with <code>lamkernels.VectorQuantize</code> on the {{ results.config.fused_backend }} backend (fused).
{% if results.config.quick %}This was a quick run.{% endif %}</p>

<p class="verdict{% if not results.agreement.curves.coincide %} apart{% endif %}">{{ verdict }}</p>

<div class="scroll"><table>
<thead><tr><th></th><th>stock</th><th>fused</th><th>stock / fused</th><th></th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td>{{ row.stock }}</td><td>{{ row.fused }}</td><td>{{ row.ratio }}</td><td>{{ row.note
  }}</td></tr>
{% endfor %}
</tbody></table></div>

<h2>The loss curves</h2>
<img src="data:image/png;base64,{{ images.curves }}" alt="Training loss of both runs, and their relative difference">
<p>Both runs start from the same weights, see the same batches in the same order and draw the same random numbers.
{% set step = results.agreement.one_bottleneck_step_relative %}
After training, one step of both bottlenecks from one and the same state: {{ "%.2f"|format(100 *
  step.index_agreement) }} % of the
rows get the same code; relative to the largest entry, the outputs differ by {{ "%.1e"|format(step.quantized) }}, the
  loss by
{{ "%.1e"|format(step.loss) }}, the gradients by {{ "%.1e"|format(step.grad_x) }} and the updated codebooks by
{{ "%.1e"|format(step.codebook_after) }}. The two trained models give
{{ "%.2f"|format(100 * results.agreement.held_out_code_agreement) }} % of the held-out tokens the same code.</p>

<h2>What the codes say about the actions</h2>
<img src="data:image/png;base64,{{ images.usage }}" alt="Use of the codes by token, and actions by code word">
{% set recovery = results.action_recovery.fused %}
<p>The model never sees an action. A linear probe, fitted on the codes of the training transitions, names the action
  of
{{ "%.1f"|format(100 * recovery.accuracy) }} % of {{ "{:,}".format(recovery.test_rows) }} held-out transitions;
  always naming the
commonest one is right in {{ "%.1f"|format(100 * recovery.majority_accuracy) }} %.</p>

<h2>Frame, next frame, prediction</h2>
<img src="data:image/png;base64,{{ images.predictions }}" alt="Held-out frames, the frames that followed and their
  predictions">
<p>Held-out transitions, one per action: those whose visible change is the median of their action's.</p>

<h2>What each code word does</h2>
<img src="data:image/png;base64,{{ images.codes }}" alt="One frame predicted under each of the commonest code words">
<p>One frame, predicted under each of the commonest code words (one code per token), in the window where the
  predictions
differ most. Above each, the action that was played most often under that word in the held-out transitions, and how
  often.</p>

<h2>How this was measured</h2>
<dl>
<dt>machine</dt><dd>{{ results.device.name }}, {{ results.device.threads }} threads</dd>
<dt>versions</dt><dd>{% for name, number in results.versions.items() %}{{ name }} {{ number }}{{ ", " if not
  loop.last }}{% endfor %}</dd>
<dt>times</dt><dd>medians; the two variants take turns in one process, so that noise hits both</dd>
<dt>memory</dt><dd>the most that torch's allocations grow in a forward and a backward{% if results.device.type ==
  "cpu" %}; what a kernel allocates outside torch is not seen{% endif %}</dd>
<dt>loss</dt><dd>squared error over that of copying the frame, pixels that change weighted
{{ 1 + results.config.model.motion_weight }} times; plus {{ results.config.model.commitment_weight }} × the
  commitment loss</dd>
<dt>data</dt><dd>ale-py, a random policy that holds each action for {{ results.config.data.mean_hold }} transitions
  on average;
{{ results.data.episodes }} episodes; the last {{ "{:,}".format(results.data.held_out_transitions) }} transitions are
  held out</dd>
<dt>settings</dt><dd><code>results.json</code>, with every number of this page</dd>
</dl>
{% endblock %}
"""
