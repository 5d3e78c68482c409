"""The default chat template of the processor: ChatML with images and videos."""

from __future__ import annotations

DEFAULT_CHAT_TEMPLATE = """\
{%- set image = namespace(number=0) -%}
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{%- set image.number = image.number + 1 -%}
{%- if add_vision_id is defined and add_vision_id -%}
{{- 'Image ' ~ image.number ~ ': ' -}}
{%- endif -%}
{{- image_token | default('<image>') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] == 'video' and video_token is defined and video_token -%}
{{- video_token -}}
{%- else -%}
{{- raise_exception("content parts must be of type 'text' or 'image', got '" ~ part['type'] ~ "'") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
