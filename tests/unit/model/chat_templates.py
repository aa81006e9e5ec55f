"""Qwen3-VL's chat templates as text, written to render a question about an image as those of its variants do. They were
not compared with the published files.

Both have a macro for contents and no system message of their own. The Thinking variant's generation prompt opens
`<think>`.
"""

_CONTENT = """\
{%- set image_count = namespace(value=0) %}
{%- set video_count = namespace(value=0) %}
{%- macro content_of(content, counted) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- if counted %}
                    {%- set image_count.value = image_count.value + 1 %}
                {%- endif %}
                {%- if add_vision_id %}
                    {{- 'Picture ' ~ image_count.value ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- if counted %}
                    {%- set video_count.value = video_count.value + 1 %}
                {%- endif %}
                {%- if add_vision_id %}
                    {{- 'Video ' ~ video_count.value ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content_of(message.content, true).split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content_of(message.content, true) }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\nOPENING' }}
{%- endif %}
"""
INSTRUCT = _CONTENT.replace("OPENING", "")
THINKING = _CONTENT.replace("OPENING", "<think>\\n")
