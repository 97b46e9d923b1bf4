{{- define "saccade.selector" -}}
app.kubernetes.io/name: saccade
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "saccade.cacheSelector" -}}
app.kubernetes.io/name: saccade-cache
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "saccade.chart" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "saccade.labels" -}}
{{ include "saccade.selector" . }}
{{ include "saccade.chart" . }}
{{- end }}

{{- define "saccade.cacheLabels" -}}
{{ include "saccade.cacheSelector" . }}
{{ include "saccade.chart" . }}
{{- end }}

{{/* What every container gives up. */}}
{{- define "saccade.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The claim that models are on; empty if they have none. */}}
{{- define "saccade.modelsClaim" -}}
{{- if .Values.models.claim }}{{ .Values.models.claim }}
{{- else if .Values.models.storage }}{{ .Release.Name }}-models
{{- end }}
{{- end }}
