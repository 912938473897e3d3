from rest_framework import serializers

from .models import Job

SHOWN = "id url task state progress message result error created_at started_at finished_at"


class JobSerializer(serializers.ModelSerializer):
    url = serializers.HyperlinkedIdentityField(view_name="job-detail")

    class Meta:
        model = Job
        fields = SHOWN.split()
