-- The answers of haproxy.cfg's refusals (txn.refusal), for HAProxy 2.6 with Lua 5.3.
--
-- HAProxy's own `return` and `deny` end a connection whose body is still coming. The client's kernel is then told that
-- its bytes were lost, and many clients report that instead of the answer. A service answers at once, and HAProxy reads
-- and throws away what is still on its way.

local REALM = 'Bearer realm="damoyolo"'

local refusals = {
    NoToken = { status = 401, message = "send the header Authorization: Bearer TOKEN", challenge = REALM },
    WrongToken = {
        status = 401,
        message = "this token is not known here",
        challenge = REALM .. ', error="invalid_token"',
    },
    ExpiredToken = {
        status = 401,
        message = "this token has expired; ask the operator for a new one",
        challenge = REALM .. ', error="invalid_token", error_description="expired"',
    },
    Forbidden = { status = 403, message = "this token has another role; ask the operator for one that fits" },
    NotFound = { status = 404, message = "there is nothing at this address" },
    MethodNotAllowed = { status = 405, message = "this address does not take this method" },
    PayloadTooLarge = { status = 413, message = "the body has more than 34000000 bytes" },
    TooManyRequests = { status = 429, message = "this token has too many requests under way", retry = 1 },
    Unavailable = { status = 503, message = "the server is full, starting or stopping", retry = 2 },
}

core.register_service("refuse", "http", function(applet)
    local kind = applet:get_var("txn.refusal")
    local refusal = refusals[kind]
    -- The form of the model's errors, and `error` for clients of KServe v1 and the Open Inference Protocol.
    local body = string.format(
        '{"code":%d,"type":"%s","message":"%s","error":"%s"}',
        refusal.status, kind, refusal.message, refusal.message
    )
    applet:set_status(refusal.status)
    applet:add_header("Content-Type", "application/json")
    applet:add_header("Content-Length", #body)
    if refusal.challenge then applet:add_header("WWW-Authenticate", refusal.challenge) end
    if refusal.retry then applet:add_header("Retry-After", refusal.retry) end
    applet:start_response()
    if applet.method ~= "HEAD" then applet:send(body) end
end)
