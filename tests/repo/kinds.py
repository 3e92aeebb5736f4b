"Hand-written schemas of the fields that deploy/ uses of kinds that no Kubernetes release knows. Unknown fields are refused, as a strict API server would."


def obj(required: str = "", **properties) -> dict:
    "An object with these fields and no others"
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required.split()}


def many(items: dict, least: int = 1) -> dict:
    return {"type": "array", "items": items, "minItems": least}


TEXT, NUMBER, INTEGER, BOOL = {"type": "string", "minLength": 1}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}
TIME = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
PERCENT = {"type": "integer", "minimum": 0, "maximum": 100}
ANY = {"type": "object"}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = obj(matchLabels=WORDS)
KEY = obj("name key", name=NAME, key=TEXT)


def one_of(*values: str) -> dict:
    return {"enum": list(values)}


GATEWAY = obj("gatewayClassName listeners", gatewayClassName=NAME, listeners=many(obj(
    "name port protocol", name=NAME, port=PORT, protocol=one_of("HTTP", "HTTPS", "TLS", "TCP", "UDP"), hostname=TEXT,
    tls=obj("", mode=one_of("Terminate", "Passthrough"), certificateRefs=many(obj("name", kind=one_of("Secret"), name=NAME, namespace=NAME))),
    allowedRoutes=obj("", namespaces=obj("", **{"from": one_of("All", "Same", "Selector")}, selector=SELECTOR)))))

ROUTE = obj("parentRefs rules", hostnames=many(NAME), parentRefs=many(obj("name", group=TEXT, kind=TEXT, name=NAME, namespace=NAME, sectionName=NAME, port=PORT)), rules=many(obj(
    "backendRefs", matches=many(obj("", path=obj("type value", type=one_of("Exact", "PathPrefix", "RegularExpression"), value={"type": "string", "pattern": "^/"}),
                                    headers=many(obj("name value", type=one_of("Exact", "RegularExpression"), name=TEXT, value=TEXT)))),
    timeouts=obj("", request=TIME, backendRequest=TIME),
    backendRefs=many(obj("name port", name=NAME, namespace=NAME, port=PORT, weight={"type": "integer", "minimum": 0, "maximum": 1_000_000})))))

MONITOR = obj("selector endpoints", selector=SELECTOR, jobLabel=TEXT, podTargetLabels=many(TEXT), endpoints=many(obj(
    "port", port=NAME, path=TEXT, scheme=one_of("http", "https"), interval=TIME, scrapeTimeout=TIME, authorization=obj("credentials", type=TEXT, credentials=KEY))))

RULES = obj("groups", groups=many(obj("name rules", name=TEXT, interval=TIME, rules=many({"oneOf": [
    obj("record expr", record={"type": "string", "pattern": "^[a-zA-Z_:][a-zA-Z0-9_:]*$"}, expr=TEXT, labels=WORDS),
    obj("alert expr for labels annotations", **{"for": TIME}, alert=TEXT, expr=TEXT, labels=WORDS, annotations=WORDS)]}))))

# Containers, volumes and the like in here are checked as those of a Pod, by the strict validator
KSERVE = obj("predictor", predictor=obj("containers", minReplicas=INTEGER, maxReplicas=INTEGER, canaryTrafficPercent=PERCENT, serviceAccountName=NAME, automountServiceAccountToken=BOOL,
                                        securityContext=ANY, containers=many(ANY), volumes=many(ANY)))

STEP = {"oneOf": [obj("setWeight", setWeight=PERCENT), obj("pause", pause=obj("", duration=TIME))]}
ROLLOUT = obj("workloadRef strategy", replicas=INTEGER, revisionHistoryLimit=INTEGER, progressDeadlineSeconds=INTEGER, progressDeadlineAbort=BOOL,
              workloadRef=obj("apiVersion kind name", apiVersion=TEXT, kind=TEXT, name=NAME, scaleDown=one_of("never", "onsuccess", "progressively")),
              strategy=obj("canary", canary=obj("stableService canaryService steps", stableService=NAME, canaryService=NAME, abortScaleDownDelaySeconds=INTEGER,
                                                trafficRouting=obj("plugins", plugins={"type": "object", "additionalProperties": obj("httpRoute namespace", httpRoute=NAME, namespace=NAME)}),
                                                analysis=obj("templates", startingStep=INTEGER, templates=many(obj("templateName", templateName=NAME)), args=many(obj("name value", name=TEXT, value=TEXT))),
                                                steps=many(STEP))))
ANALYSIS = obj("metrics", args=many(obj("name", name=TEXT, value=TEXT)), metrics=many(obj(
    "name provider successCondition failureCondition", name=TEXT, interval=TIME, failureLimit=INTEGER, inconclusiveLimit=INTEGER, successCondition=TEXT, failureCondition=TEXT,
    provider=obj("prometheus", prometheus=obj("address query", address=TEXT, query=TEXT)))))

REF = obj("apiVersion kind name", apiVersion=TEXT, kind=TEXT, name=NAME)
CANARY = obj("targetRef service analysis", provider=TEXT, targetRef=REF, autoscalerRef=REF, progressDeadlineSeconds=INTEGER, service=obj(
    "port", name=NAME, port=PORT, targetPort={"anyOf": [PORT, NAME]}, portName=NAME, primary=obj(labels=WORDS), canary=obj(labels=WORDS), hosts=many(NAME), gatewayRefs=many(obj("name", group=TEXT, kind=TEXT, name=NAME, namespace=NAME))),
    analysis=obj("interval threshold metrics", interval=TIME, threshold=INTEGER, stepWeights=many(PERCENT), metrics=many(obj(
        "name thresholdRange", name=TEXT, templateRef=obj("name", name=NAME, namespace=NAME), thresholdRange=obj("", min=NUMBER, max=NUMBER), interval=TIME))))
TEMPLATE = obj("provider query", provider=obj("type address", type=TEXT, address=TEXT), query=TEXT)


def kind(version: str, name: str, spec: dict) -> dict:
    "The schema of an object"
    meta = obj("name", name=NAME, namespace=NAME, labels=WORDS, annotations=WORDS)
    return obj("apiVersion kind metadata spec", apiVersion={"const": version}, kind={"const": name}, metadata=meta, spec=spec)


KINDS = {name: kind(version, name, spec) for version, name, spec in [
    ("gateway.networking.k8s.io/v1", "Gateway", GATEWAY), ("gateway.networking.k8s.io/v1", "HTTPRoute", ROUTE),
    ("monitoring.coreos.com/v1", "ServiceMonitor", MONITOR), ("monitoring.coreos.com/v1", "PrometheusRule", RULES),
    ("serving.kserve.io/v1beta1", "InferenceService", KSERVE),
    ("argoproj.io/v1alpha1", "Rollout", ROLLOUT), ("argoproj.io/v1alpha1", "AnalysisTemplate", ANALYSIS),
    ("flagger.app/v1beta1", "Canary", CANARY), ("flagger.app/v1beta1", "MetricTemplate", TEMPLATE)]}

SERVICE = obj("image mem_limit cpus", image=TEXT, build=obj("context target", context=TEXT, dockerfile=TEXT, target=TEXT), user={"type": "string", "pattern": "^[1-9][0-9]*:[0-9]+$"}, restart=TEXT, cap_drop=many(TEXT),
              security_opt=many(TEXT), environment=WORDS, secrets=many(TEXT), volumes=many({"anyOf": [TEXT, obj("type source target", type=TEXT, source=TEXT, target=TEXT, read_only=BOOL)]}),
              command=many({"type": "string"}), entrypoint=many(TEXT), healthcheck=obj("test interval timeout retries", test=many(TEXT), interval=TIME, timeout=TIME, retries=INTEGER),
              depends_on={"anyOf": [many(NAME), {"type": "object", "additionalProperties": obj("condition", condition=one_of("service_healthy", "service_started", "service_completed_successfully"))}]},
              profiles=many(NAME), read_only=BOOL, tmpfs=many(TEXT), stop_grace_period=TIME, mem_limit=TEXT, cpus=NUMBER, ports=many({"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}))
COMPOSE = obj("name services volumes secrets", **{"x-careful": ANY}, name=NAME, services={"type": "object", "additionalProperties": SERVICE}, volumes={"type": "object", "additionalProperties": obj()},
              secrets={"type": "object", "additionalProperties": obj("file", file={"type": "string", "pattern": r"^\./secrets/"})})
