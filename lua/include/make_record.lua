-- Put a record together; see split_record.
local function make_record(game_id, body)
  if game_id == '' then
    -- As below, without a number to format, which takes longer than the rest.
    return '0:' .. body
  end
  return #game_id .. ':' .. game_id .. body
end
