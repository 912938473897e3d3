"""The result backend of DynamoDB, through its errors. Only its workers import boto3, which takes a second."""

from celery import states
from celery.backends import dynamodb

from celery_steady.results import KeepsResults, StoresChordMembers


class DynamoDBBackend(StoresChordMembers, KeepsResults, dynamodb.DynamoDBBackend):
    def _get_client(self, access_key_id=None, secret_access_key=None):
        """Make a client with the timeouts of result_backend_transport_options: Celery has none for it."""
        if self._client is None:
            import boto3
            from botocore.config import Config

            options = self.app.conf.result_backend_transport_options.get("client-config", {})
            self._client = boto3.client(
                "dynamodb",
                region_name=self.aws_region,
                aws_access_key_id=access_key_id,
                aws_secret_access_key=secret_access_key,
                endpoint_url=self.endpoint_url,
                config=Config(**options),
            )
            self._get_or_create_table()
            if self._has_ttl() is not None:
                self._validate_ttl_methods()
                self._set_table_ttl()
        return self._client

    def exception_safe_to_retry(self, error):
        """Tell Celery which errors may end. It tries to store the result again until they do.

        Celery's own method knows none: celery pull 9614 added those of another backend.
        """
        from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

        if isinstance(error, ClientError):  # DynamoDB has an error of its own, or is too busy
            code = error.response["Error"]["Code"]
            failed = error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
            return failed or "Throttling" in code or code.endswith("LimitExceeded")
        return isinstance(error, (ConnectionError, HTTPClientError))

    def _set_with_state(self, key, value, state):
        if state != states.RETRY:
            return super()._set_with_state(key, value, state)
        while not self.is_result(seen := self.get(key)) and not self.replace(key, value, seen):
            pass

    def replace(self, key, value, seen):
        """Store this value, if the stored one is what was seen. Return whether it was."""
        from botocore.exceptions import ClientError

        request = self._prepare_put_request(str(key), value)
        request["ConditionExpression"] = "attribute_not_exists(#result)"
        request["ExpressionAttributeNames"] = {"#result": self._value_field.name}
        if seen:
            request["ConditionExpression"] = "#result = :seen"
            request["ExpressionAttributeValues"] = {":seen": {self._value_field.data_type: seen}}
        try:
            self.client.put_item(**request)
        except ClientError as error:
            if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                raise
            return False
        return True
