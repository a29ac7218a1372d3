"""The page of ``lamkernels fit --model nonlinear``; its figures and numbers come from ``fit_nonlinear_report.py``."""

TEMPLATE = """{% extends "base" %}
{% block title %}lamkernels fit: latent actions{% endblock %}
{% block body %}
<h1>The latent actions of {{ title }}</h1>
<p class="lead">{{ "{:,}".format(results.frames) }} frames of {{ "{:,}".format(results.sources) }}
  {{ "source" if results.sources == 1 else "sources" }}, {{ results.config.frames.side }} pixels squared;
trained for {{ "{:,}".format(results.config.training.steps) }} steps on
{{ "{:,}".format(results.pairs.fitted) }} pairs of frames that are {{ results.config.frames.lag }} apart,
{{ "{:,}".format(results.pairs.held_out) }} pairs held out.</p>

{% for line in verdict %}
<p class="verdict{% if not line.good %} apart{% endif %}">{{ line.text }}</p>
{% endfor %}

<div class="scroll"><table>
<thead><tr><th></th><th>value</th><th></th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.name }}</td><td>{{ row.value }}</td><td>{{ row.note }}</td></tr>
{% endfor %}
</tbody></table></div>

<h2>What each latent action does to a frame</h2>
<img src="data:image/png;base64,{{ images.traversals }}" alt="Frames predicted under different latent actions">
{% if results.codes %}
<p>Each column is one code word, the commonest ones: one code for each of the {{ results.config.model.tokens }} tokens
of a transition. The upper picture is the next frame that the model predicts under that word, the lower one what that
changes in the frame: red becomes brighter, blue darker. A latent action that says what the agent does changes the
agent in the same way in every row. One that changes the background, the light or the whole picture encodes something
else.</p>
{% else %}
<p>The latent actions are continuous. Each pair of columns follows one direction in which they vary most, two standard
deviations to either side of the mean. The upper picture is the next frame that the model predicts there, the lower one
what that changes in the frame: red becomes brighter, blue darker. A direction that says what the agent does changes
the agent in the same way in every row.</p>
{% endif %}
{% if images.tokens %}

<h2>What each code of each token does</h2>
<img src="data:image/png;base64,{{ images.tokens }}" alt="Effect of every code of every token on one prediction">
<p>The first frame of the figure above, with the latent action that was inferred for it. One token at a time takes
another code: red is where the prediction becomes brighter, blue darker. The code that the token had changes
nothing.</p>
{% endif %}

<h2>Frame, next frame, prediction</h2>
<img src="data:image/png;base64,{{ images.predictions }}" alt="Frames, those that followed and their predictions">
<p>{{ "Held-out pairs" if results.prediction.on == "held_out" else "Pairs" }} at the median, the 75th and the 95th
percentile of how much changes.</p>
{% if results.codes %}

<h2>Use of the codes</h2>
<img src="data:image/png;base64,{{ images.usage }}" alt="Share of each code by token">
<p>{{ results.codes.used }} of {{ results.config.model.codebook_size }} codes are in use, in
{{ "{:,}".format(results.codes.words) }} combinations; all codes alike would have the perplexity
{{ results.config.model.codebook_size }}, and here it is {{ "%.1f"|format(results.codes.perplexity) }}.</p>
{% endif %}
{% if images.actions %}

<h2>Codes and actions</h2>
<img src="data:image/png;base64,{{ images.actions }}" alt="Actions by code word">
<p>The model has never seen an action. Rows that differ are code words that tell actions apart.</p>
{% endif %}

<h2>The losses</h2>
<img src="data:image/png;base64,{{ images.losses }}" alt="Training losses by step">

<h2>How this was measured</h2>
<dl>
<dt>held out</dt><dd>every fifth segment of {{ results.segment }} frames of a source; no pair has a frame on either
  side</dd>
<dt>measured on</dt><dd>{{ "{:,}".format(results.measured.fitted) }} fitted and
  {{ "{:,}".format(results.measured.held_out) }} held-out pairs, evenly spread</dd>
<dt>error</dt><dd>squared, over that of copying the frame, pixels that change weighted
{{ 1 + results.config.model.motion_weight }} times: what training minimises. PSNR weighs all pixels alike, and where
little moves a copy is hard to beat</dd>
<dt>actions</dt><dd>ridge probes on the latent action given o, the frame at {{ results.given_side }} pixels squared,
  fitted on the fitted pairs and tested on the held-out ones</dd>
{% if results.exogenous %}
<dt>leakage</dt><dd>the same of the exogenous state of the next frame, given that of the frame too</dd>
{% endif %}
<dt>model</dt><dd>{{ results.config.model.bottleneck }} bottleneck, {{ results.config.model.tokens }} tokens of
{{ results.config.model.latent_dim }} dimensions, seed {{ results.config.training.seed }};
<code>model.safetensors</code></dd>
<dt>settings</dt><dd><code>report.json</code>, with every number of this page</dd>
{% for source, reason in results.skipped %}
<dt>skipped</dt><dd>{{ source }}: {{ reason }}</dd>
{% endfor %}
</dl>
{% endblock %}
"""
