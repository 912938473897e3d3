"""The result backend of DynamoDB, through its errors. Only its workers import boto3, which takes a second."""

from celery.backends import dynamodb

from celery_steady.results import KeepsResults, StoresChordMembers


class DynamoDBBackend(StoresChordMembers, KeepsResults, dynamodb.DynamoDBBackend):
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
